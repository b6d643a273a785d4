-- Which actions Argo CD offers for a QLoRAJob.
local succeeded, failed = false, false
for _, condition in ipairs((obj.status or {}).conditions or {}) do
  succeeded = succeeded or (condition.type == "Succeeded" and condition.status == "True")
  failed = failed or (condition.type == "Failed" and condition.status == "True")
end

local actions = {}
if succeeded or obj.spec.cancel then
  return actions
elseif failed then
  actions["retry"] = {iconClass = "fa fa-fw fa-redo"}
elseif obj.spec.suspend then
  actions["resume"] = {iconClass = "fa fa-fw fa-play"}
else
  actions["suspend"] = {iconClass = "fa fa-fw fa-pause"}
end
return actions
