"""The tests: a package, so that no installed package of that name can take its place on the path."""
