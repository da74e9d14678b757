"""Packed data sets under a URL: the store, the bounded cache on disk, a copy of the small files.

Which samples are needed next, and so which blocks to fetch ahead, is `unicl_fast.pipelines`' work.
"""
