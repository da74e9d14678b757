"""`unicl-bench`: measures each part beside alternatives. README.md here explains the results."""
