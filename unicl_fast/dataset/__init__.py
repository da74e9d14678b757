"""The packed format: writing it, reading it, checking it, from disk or from object stores.

`manifest`, `arrays`, `files` and `reader` read a data set; `growing_files` and `writer` write one;
`stored_samples` reads whole samples with their texts; `remote` speaks to object stores. How sources
become a packed data set is `unicl_fast.packing`'s work, which samples a step takes is
`unicl_fast.pipelines`'.
"""
