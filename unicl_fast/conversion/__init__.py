"""Models in and out: microsoft/UniCL's files, open_clip, timm, the Hugging Face hub, ONNX.

Out: `official`, `open_clip`, `libraries` (timm, ONNX) and `export` (with `hugging_face`, `card` and
`figures`) write one format each, by `output` and `preprocessing`.
In: `sources` finds models and renames their weights, `initial` loads them or starts a run's.
"""
