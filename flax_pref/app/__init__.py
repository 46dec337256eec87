"""A page in the browser to play with prompts, rules and strengths."""
