"""Silent bugs that really happened, each as a mutant of ours; only `recipes.verify museum=NAME` loads this."""
