{{/* The operator's settings, and the ports that the Deployment names. */}}
{{- define "qlora-operator.settings" -}}
{{- $decided := dict "namespaces" .Values.namespaces "probePort" 8080 "metricsPort" 9090 "jobNetworkPolicies" .Values.jobNetworkPolicies -}}
{{- $_ := set $decided "leaderElection" (dict "leaseName" (include "qlora-operator.fullname" .)) -}}
{{- toYaml (merge $decided (deepCopy .Values.settings)) -}}
{{- end }}
