"""Photographs that Python packages ship, with captions written for this demo.

The last caption of each is held out: training does not see it.
"""

from __future__ import annotations

_SKIMAGE = "skimage/data"
_SKLEARN = "sklearn/datasets/images"
_MATPLOTLIB = "matplotlib/mpl-data/sample_data"

CAPTIONS = {
    f"{_SKIMAGE}/astronaut.png": (
        "a smiling astronaut in an orange space suit",
        "a woman in an orange suit with a helmet, a flag and a model of a rocket behind her",
        "portrait of an astronaut before the flag of the United States",
        "an astronaut with her helmet smiles",
    ),
    f"{_SKIMAGE}/brick.png": (
        "a wall of bricks",
        "rows of long narrow bricks, in grey",
        "brickwork with mortar between the bricks",
        "a grey brick wall",
    ),
    f"{_SKIMAGE}/camera.png": (
        "a man looks through a camera on a tripod",
        "a photographer in a dark coat stands on a lawn",
        "black and white photo of a man who films a park",
        "a man in a coat with a camera",
    ),
    f"{_SKIMAGE}/cell.png": (
        "a single bright cell under a microscope",
        "a small round cell on a dark grey ground",
        "microscope image of one cell",
        "a cell, seen through a microscope",
    ),
    f"{_SKIMAGE}/chelsea.png": (
        "the face of a cat with green eyes",
        "a ginger cat looks to the side",
        "close view of a tabby cat",
        "a cat with whiskers and green eyes",
    ),
    f"{_SKIMAGE}/clock_motion.png": (
        "a clock, blurred by motion",
        "a blurred round clock on a grey wall",
        "a clock photographed by a shaking hand",
        "a blurred clock",
    ),
    f"{_SKIMAGE}/coffee.png": (
        "a cup of coffee on a red saucer",
        "an espresso in a red cup with a spoon, on a wooden table",
        "coffee in a cup on a table of wood",
        "a red cup full of coffee",
    ),
    f"{_SKIMAGE}/coins.png": (
        "ancient coins in four rows",
        "a collection of old Greek coins",
        "many silver coins on a dark board",
        "rows of old coins",
    ),
    f"{_SKIMAGE}/color.png": (
        "a wheel with all colours of the rainbow",
        "a colour wheel on a black ground, white in its middle",
        "a disc that fades from red to green and blue",
        "a round wheel of colours",
    ),
    f"{_SKIMAGE}/grass.png": (
        "grass and clover from above",
        "a lawn with dry grass, in grey",
        "blades of grass on the ground",
        "a lawn seen from above",
    ),
    f"{_SKIMAGE}/gravel.png": (
        "gravel on the ground",
        "many small grey stones",
        "a path of gravel, from above",
        "small stones of gravel",
    ),
    f"{_SKIMAGE}/horse.png": (
        "the black silhouette of a horse",
        "a drawing of a horse in black on white",
        "the outline of a standing horse, filled with black",
        "a horse in black and white",
    ),
    f"{_SKIMAGE}/hubble_deep_field.jpg": (
        "thousands of galaxies in a dark sky",
        "deep space with stars and galaxies, by the Hubble telescope",
        "galaxies of many colours, far away in space",
        "stars and galaxies in space",
    ),
    f"{_SKIMAGE}/ihc.png": (
        "stained tissue under a microscope",
        "a slice of tissue in brown and blue",
        "brown glands and blue nuclei, a stained tissue",
        "tissue with a brown and blue stain",
    ),
    f"{_SKIMAGE}/moon.png": (
        "the surface of the moon with craters",
        "craters on the grey moon",
        "the moon from close by",
        "a crater on the moon",
    ),
    f"{_SKIMAGE}/motorcycle_left.png": (
        "a red motorcycle in a garage",
        "a parked motorcycle before shelves in a workshop",
        "a motorcycle with a red tank indoors",
        "a motorcycle in a workshop",
    ),
    f"{_SKIMAGE}/page.png": (
        "a page of printed text",
        "a photo of a page in a book about segmentation",
        "black printed words on white paper",
        "printed text on a page",
    ),
    f"{_SKIMAGE}/retina.jpg": (
        "the retina of an eye with its vessels",
        "the back of an eye, red and round",
        "blood vessels on a red retina",
        "a retina, photographed by an eye doctor",
    ),
    f"{_SKIMAGE}/rocket.jpg": (
        "a rocket on its launch pad in the evening",
        "a white rocket between towers under a dark blue sky",
        "lights shine on a rocket before its launch",
        "a rocket ready for launch",
    ),
    f"{_SKIMAGE}/text.png": (
        "formulas written by hand on paper",
        "a handwritten sheet of mathematics, in grey",
        "handwriting with letters and lines",
        "a sheet with handwritten formulas",
    ),
    f"{_SKLEARN}/china.jpg": (
        "a Chinese temple above a lake",
        "a pagoda with many roofs among trees",
        "the tower of a palace in China, with the lake behind",
        "a temple in China",
    ),
    f"{_SKLEARN}/flower.jpg": (
        "an orange dahlia before dark leaves",
        "a flower with many petals in orange",
        "close view of a blooming flower",
        "an orange flower",
    ),
    f"{_MATPLOTLIB}/grace_hopper.jpg": (
        "an old admiral in navy uniform",
        "a woman with glasses and a navy cap before a flag",
        "portrait of a naval officer with medals",
        "an officer of the navy in uniform",
    ),
}  # fmt: skip
"""By path: the package, and the file inside it."""
