-- The health of a QLoRAJob or QLoRASweep, which Argo CD passes as `obj`. Its Lua has the libraries base, table and a part of os only.
local status = obj.status or {}
local conditions = {}
for _, condition in ipairs(status.conditions or {}) do
  conditions[condition.type] = condition
end

local function holds(kind)
  return conditions[kind] ~= nil and conditions[kind].status == "True"
end

if conditions.Succeeded == nil then
  return {status = "Progressing", message = "the operator has not seen it yet"}
end
-- What the conditions report may be over, for example the failure of a job that is being retried.
if status.observedGeneration ~= obj.metadata.generation then
  return {status = "Progressing", message = "the operator has not seen the latest change yet"}
end
if holds("Succeeded") then
  return {status = "Healthy", message = conditions.Succeeded.message}
end
if holds("Failed") then
  return {status = "Degraded", message = conditions.Failed.reason .. ": " .. conditions.Failed.message}
end
if holds("Suspended") then
  return {status = "Suspended", message = conditions.Suspended.message}
end

local message = conditions.Succeeded.message
local progress = status.progress or {}
-- The reason is the phase unless something blocks the job, which is then more important than its progress.
if conditions.Succeeded.reason == status.phase and (progress.summary or "") ~= "" then
  message = progress.summary
  if progress.loss ~= nil then
    message = message .. ", loss " .. progress.loss
  end
  if (progress.remaining or "") ~= "" then
    message = message .. ", " .. progress.remaining .. " left"
  end
end
return {status = "Progressing", message = message}
