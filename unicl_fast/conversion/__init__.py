"""Models in and out: microsoft/UniCL's files, open_clip, timm, the Hugging Face hub, ONNX, .pt2.

Out: `official`, `open_clip`, `libraries` and `export` (our own format, with its `card` and
`figures`) each write a format; `output` makes a file or folder appear whole or not at all, once its
features are ours, and `preprocessing` says how images and texts are prepared.

In: `sources` finds weights on the disk or the hub and gives them our names, `initial` starts a
model from them, `official` makes a model of a released file; `fitting` says what does not fit, and
`torch_files` reads tensors out of pickles. Our own checkpoints are `unicl_fast.checkpoints`'.
"""
