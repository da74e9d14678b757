"""One encoded image: is it sound, how large is it, its pixels, and how it is encoded again.

Packing and checking use it. Decoding for training is `unicl_fast.pipelines`' work.
"""
