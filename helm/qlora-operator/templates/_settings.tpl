{{/* The operator's settings, the ports that the Deployment names, and every profile in full. */}}
{{- define "qlora-operator.settings" -}}
{{- $trainer := include "qlora-operator.image" (list .Values.trainer.image .Chart.AppVersion) -}}
{{- $profiles := dict -}}
{{- range $name, $profile := .Values.profiles -}}
{{- $full := dict "image" $trainer -}}
{{- range $key, $value := $.Values.profiles.default }}{{ $_ := set $full $key $value }}{{ end -}}
{{- range $key, $value := $profile }}{{ $_ := set $full $key $value }}{{ end -}}
{{- if and $full.gpuResource (ne (dig "workspace" "topology" "zonal" $full) "shared") -}}
{{- if and (not (hasKey $full "nodeSelector")) (eq $full.gpuResource "nvidia.com/gpu") -}}
{{- $_ := set $full "nodeSelector" (dict "nvidia.com/gpu.present" "true") -}}
{{- end -}}
{{- if not $full.nodeSelector -}}
{{- fail (printf "profiles.%s: gpuResource is set, nodeSelector is not, and workspace.topology is not shared: prepare asks for no GPU, so it may bind the volume where there is none, and train would wait for ever. Set nodeSelector to labels that your GPU nodes have and others have not, or workspace.topology to shared if the volume can be mounted on every node" $name) -}}
{{- end -}}
{{- end -}}
{{- $_ := set $profiles $name $full -}}
{{- end -}}
{{- $decided := dict "namespaces" .Values.namespaces "profiles" $profiles "probePort" 8080 "metricsPort" 9090 "jobNetworkPolicies" .Values.jobNetworkPolicies -}}
{{- $_ := set $decided "leaderElection" (dict "leaseName" (include "qlora-operator.fullname" .)) -}}
{{- toYaml (merge $decided (deepCopy .Values.settings)) -}}
{{- end }}
