"""From strings to token rows: tokenizer, class names, prompts, equal rows, joined classes."""
