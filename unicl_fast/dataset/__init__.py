"""The packed format: writing it, reading it, checking it, from disk or from object stores.

How sources become a packed data set is `unicl_fast.packing`'s work, which samples a step takes is
`unicl_fast.pipelines`'.
"""
