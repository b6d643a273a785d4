{{/* Labels that select the door's pods, and not the operator's; they never change. */}}
{{- define "qlora-operator.doorSelectorLabels" -}}
app.kubernetes.io/name: {{ default .Chart.Name .Values.nameOverride }}-door
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{/* Labels of the door's objects. */}}
{{- define "qlora-operator.doorLabels" -}}
{{ include "qlora-operator.doorSelectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end }}

{{/* The door's settings, and the ports that the Deployment names. */}}
{{- define "qlora-operator.doorSettings" -}}
{{- $decided := dict "namespaces" .Values.namespaces "port" 8000 "probePort" 8080 "metricsPort" 9090 -}}
{{- toYaml (merge $decided (deepCopy .Values.door.settings)) -}}
{{- end }}

{{/* The requests that the door may make as the user whom it impersonates. */}}
{{- define "qlora-operator.doorVerbs" -}}
- apiGroups: [qlora.dev]
  resources: [qlorajobs]
  verbs:
    {{- range $kind := list "serviceaccount" "user-info" }}
    {{- range list "get" "list" "create" "patch" "delete" }}
    - "impersonate-on:{{ $kind }}:{{ . }}"
    {{- end }}
    {{- end }}
- apiGroups: [""]
  resources: [configmaps]
  verbs:
    {{- range $kind := list "serviceaccount" "user-info" }}
    {{- range list "get" "list" "create" "delete" }}
    - "impersonate-on:{{ $kind }}:{{ . }}"
    {{- end }}
    {{- end }}
{{- end }}
