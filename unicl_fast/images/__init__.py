"""One encoded image: is it sound, how large is it, its pixels, and how it is encoded again.

Used when packing and when checking. Decoding for training is `unicl_fast.pipelines`' work.
"""
