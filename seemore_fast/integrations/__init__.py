"""SeemoRe in other people's frameworks: import the submodule of the one you use, it asks for that framework alone."""
