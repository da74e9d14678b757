"""`unicl-bench`: measures each part against alternatives. README.md here explains the results."""
