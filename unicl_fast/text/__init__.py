"""From strings to token rows: tokenizers, class names, prompts, equal rows, merged classes."""
