"""Readers of what people have: class folders, lists, tars, tables, COCO, CIFAR, IDX and others.

Each yields `items.Item`s; nothing is decoded here.
"""
