"""Models in and out: microsoft/UniCL's files, open_clip, timm, the Hugging Face hub, ONNX, .pt2.

`official`, `open_clip`, `libraries` and `export` write models. The last one writes our own format
and holds what all share: a whole model or nothing, whose features are compared with ours before it
appears; `card` writes what is known of it. `initial` starts a model from weights that `sources`
finds, on the disk or the hub; `torch_files` reads tensors out of pickles.
Options and messages are `tools/convert/`'s work, reading our own checkpoints and exports
`unicl_fast.checkpoints`'.
"""
