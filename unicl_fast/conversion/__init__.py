"""Models in and out: microsoft/UniCL's files, open_clip, timm, the Hugging Face hub, ONNX, .pt2.

One module a format. Each writes a whole model, or nothing, and compares what its readers will get
with ours (`comparison`). `tools/convert.py` is the command line.
"""
