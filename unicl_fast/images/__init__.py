"""One encoded image: is it sound, how large is it, its pixels, and how it is encoded again."""
