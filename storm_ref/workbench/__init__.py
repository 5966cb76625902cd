"""What a user runs: data in and out, observations, training, trials, figures and the command line. Not normative."""
