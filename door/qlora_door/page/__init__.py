"""The page for people: static files, and the few requests that they make with the viewer's key."""
