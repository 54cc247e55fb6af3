"""Where versions are pushed to and pulled from."""
