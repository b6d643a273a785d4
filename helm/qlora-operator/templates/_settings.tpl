{{/* What the operator reads: the settings, the ports that the Deployment names, and every profile in full. */}}
{{- define "qlora-operator.settings" -}}
{{- $trainer := include "qlora-operator.image" (list .Values.trainer.image .Chart.AppVersion) -}}
{{- $profiles := dict -}}
{{- range $name, $profile := .Values.profiles -}}
{{- $full := dict "image" $trainer -}}
{{- range $key, $value := $.Values.profiles.default }}{{ $_ := set $full $key $value }}{{ end -}}
{{- range $key, $value := $profile }}{{ $_ := set $full $key $value }}{{ end -}}
{{- $_ := set $profiles $name $full -}}
{{- end -}}
{{- $decided := dict "namespaces" .Values.namespaces "profiles" $profiles "probePort" 8080 "metricsPort" 9090 -}}
{{- $_ := set $decided "leaderElection" (dict "leaseName" (include "qlora-operator.fullname" .)) -}}
{{- toYaml (merge $decided (deepCopy .Values.settings)) -}}
{{- end }}
