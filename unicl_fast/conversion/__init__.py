"""Models in and out: microsoft/UniCL's files, open_clip, timm, the Hugging Face hub, ONNX, .pt2.

Out: `official`, `open_clip`, `libraries` (timm, ONNX, torch.export) and `export` (our own format,
with its `card` and `figures`) write one format each. `output` writes whole files and folders and
compares features, `preprocessing` describes how images and texts are prepared.

In: `sources` finds weights on the disk or the hub and renames them, `initial` starts a model from
them, and `official` builds a model from a released file. `fitting` lists what does not fit, and
`torch_files` reads pickles. Our own checkpoints are in `unicl_fast.checkpoints`.
"""
