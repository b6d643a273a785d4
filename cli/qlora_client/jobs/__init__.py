"""Jobs as users see them: their state, pods, Events and logs."""
