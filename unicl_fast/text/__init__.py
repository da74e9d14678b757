"""From strings to token rows: tokenizer, class names, prompts, equal rows, joined classes.

The text encoder is in `unicl_fast.models`; which texts are positives is `unicl_fast.objectives`'
work.
"""
