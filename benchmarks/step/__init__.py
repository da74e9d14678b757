"""`unicl-bench step`: whole training steps, their switches, parts and memory."""
