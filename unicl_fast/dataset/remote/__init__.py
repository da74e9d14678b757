"""Data sets on object stores: any URL that fsspec knows, read in ranges through a local cache.

`object_store` asks with patience and names what it did not get; `block_cache` keeps what came, for
all processes of a machine; `mirror` holds a data set's small files; `block_reader` stands in for
`unicl_fast.dataset.file_ranges`. What is read ahead is decided by whoever knows the order.
"""
