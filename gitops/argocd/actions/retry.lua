-- A failed job is resumed at its failed step whenever the number is raised.
local retry = obj.spec.retry or {}
retry.request = (retry.request or 0) + 1
obj.spec.retry = retry
return obj
