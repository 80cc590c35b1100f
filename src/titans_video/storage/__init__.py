"""Where the bytes of a file are: on this machine, inside a tar, or on a server."""
