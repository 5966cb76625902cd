"""Programs for users: data in and out, observations, training, trials, figures, the command line. Not normative."""
