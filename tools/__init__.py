"""The programs, one thin file each: they read arguments, call the library and print."""
