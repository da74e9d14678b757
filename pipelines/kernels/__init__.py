"""Numba loops on pixels and JPEG bytes: resampling, augmentation, cutting files to windows."""
