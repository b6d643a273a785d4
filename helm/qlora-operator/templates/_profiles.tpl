{{/* Adds each profile in full to a dictionary: (list CONTEXT DICTIONARY). Parsed from text, large numbers would get an exponent. */}}
{{- define "qlora-operator.addProfiles" -}}
{{- $context := index . 0 -}}
{{- $profiles := index . 1 -}}
{{- range $name, $profile := $context.Values.profiles -}}
{{- $full := dict "image" (include "qlora-operator.image" (list $context.Values.trainer.image $context.Chart.AppVersion)) -}}
{{- range $part := list $context.Values.profiles.default $profile -}}
{{- range $key, $value := $part -}}
{{- /* A null is a field that is not set, also if the default is. */ -}}
{{- if kindIs "invalid" $value }}{{ $_ := unset $full $key }}{{ else }}{{ $_ := set $full $key $value }}{{ end -}}
{{- end -}}
{{- end -}}
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
{{- end }}
