"""The packed format: writing it, reading it, checking it, from disk or from object stores.

`manifest`, `arrays`, `files` and `reader` read a data set, `object_store` and `block_cache` one
under a URL; `growing_files` and `writer` write one; `stored_samples` reads whole samples with their
texts. How sources become a packed data set is `unicl_fast.packing`'s work, which samples a step
takes, and so which blocks to fetch ahead, is `unicl_fast.pipelines`'.
"""
