"""Reports: one JSON document (`document`), and the surfaces that are made from nothing but it."""
