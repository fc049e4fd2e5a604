"""`lift-report`: what was run and what came out, on one page that needs nothing else."""
