"""Models in and out: microsoft/UniCL's files, open_clip, timm, the Hugging Face hub, ONNX, .pt2.

`requests` holds the commands of `unicl-convert`; each is run by the module of its format, and all
write by `checked_output`: a whole model or nothing, whose features are compared with ours before
it appears. Reading arguments is `tools/convert.py`'s work, reading our own checkpoints and exports
`unicl_fast.checkpoints`'.
"""
