"""An engine as its front sees it: a process that may die, and the pipe to it."""
