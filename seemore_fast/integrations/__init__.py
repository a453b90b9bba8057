"""SeemoRe in other frameworks, one submodule each, which needs only that framework."""
