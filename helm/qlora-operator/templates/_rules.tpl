{{/* Everything that the operator may do. No secrets, no wildcard, nothing on anybody's object but a QLoRAJob's status. */}}
{{- define "qlora-operator.rules" -}}
- apiGroups: [qlora.dev]
  resources: [qlorajobs]
  verbs: [get, list, watch]
- apiGroups: [qlora.dev]
  resources: [qlorajobs/status]
  verbs: [patch]
- apiGroups: [batch]
  resources: [jobs]
  verbs: [get, list, watch, create, delete]
- apiGroups: [""]
  resources: [pods]
  verbs: [get, list, watch]
{{- if .Values.settings.progress.enabled }}
- apiGroups: [""]
  resources: [pods/log]
  verbs: [get]
{{- end }}
- apiGroups: [""]
  resources: [persistentvolumeclaims]
  verbs: [get, create]
- apiGroups: [""]
  resources: [events]
  verbs: [create]
{{- end }}
