{{/*
All rights of the operator: no secrets, no wildcard. Of a job it writes the status, and of a cell also spec.suspend,
spec.cleanupAfterSeconds and annotations of its own. It deletes jobs and sweeps by their ttlSecondsAfterFinished, and the
claims that it has created by their retention policy, which also decides their owners.
*/}}
{{- define "qlora-operator.rules" -}}
- apiGroups: [qlora.dev]
  resources: [qlorajobs, qlorasweeps]
  verbs: [get, list, watch]
- apiGroups: [qlora.dev]
  resources: [qlorajobs/status, qlorasweeps/status]
  verbs: [patch]
# The cells of a sweep. It also suspends, resumes and marks them, and has them cleaned up.
- apiGroups: [qlora.dev]
  resources: [qlorajobs]
  verbs: [create, patch, delete]
- apiGroups: [qlora.dev]
  resources: [qlorasweeps]
  verbs: [delete]
- apiGroups: [batch]
  resources: [jobs]
  verbs: [get, list, watch, create, delete]
# What was fixed at the start of a job. Those of a restored job get it as their owner.
- apiGroups: [apps]
  resources: [controllerrevisions]
  verbs: [get, list, create, patch]
- apiGroups: [""]
  resources: [pods]
  verbs: [list, watch]
{{- if .Values.settings.progress.enabled }}
- apiGroups: [""]
  resources: [pods/log]
  verbs: [get]
{{- end }}
{{- if (.Values.kueue).enabled }}
- apiGroups: [kueue.x-k8s.io]
  resources: [workloads]
  verbs: [list]
{{- end }}
{{- if (.Values.announce).enabled }}
- apiGroups: [""]
  resources: [configmaps]
  verbs: [create, patch]
{{- end }}
- apiGroups: [""]
  resources: [persistentvolumeclaims]
  verbs: [get, create, patch, delete]
# The train pods of a job on several nodes find and reach one another through these.
- apiGroups: [""]
  resources: [services]
  verbs: [create]
# A right to apply, which creates an object if it does not exist, consists of both verbs.
- apiGroups: [networking.k8s.io]
  resources: [networkpolicies]
  verbs: [create, patch]
- apiGroups: [""]
  resources: [events]
  verbs: [create]
{{- end }}
