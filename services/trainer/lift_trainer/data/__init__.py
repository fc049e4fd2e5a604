"""`lift-data`: the two demo data sets, made from nothing but packages and a seed."""
