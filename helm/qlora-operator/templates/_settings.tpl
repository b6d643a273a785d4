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
{{- toYaml (merge $decided .Values.settings) -}}
{{- end }}

{{/* Ports of the servers that the profiles name, as a JSON list: those of their URLs, or of the scheme. */}}
{{- define "qlora-operator.serverPorts" -}}
{{- $ports := list -}}
{{- range (include "qlora-operator.settings" . | fromYaml).profiles -}}
{{- $store := default dict .objectStore -}}
{{- $servers := list (default "https://huggingface.co" .hubEndpoint) (default "https://s3.amazonaws.com" $store.endpoint) -}}
{{- range .registries }}{{ $servers = append $servers (ternary . (printf "https://%s" .) (contains "://" .)) }}{{ end -}}
{{- range $servers -}}
{{- $port := regexFind ":[0-9]+$" (urlParse .).host | trimPrefix ":" -}}
{{- $ports = append $ports (int (default (ternary "80" "443" (hasPrefix "http://" .)) $port)) -}}
{{- end -}}
{{- end -}}
{{- toJson (uniq $ports) -}}
{{- end }}
