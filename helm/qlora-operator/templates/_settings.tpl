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
{{- $decided := dict "namespaces" .Values.namespaces "profiles" $profiles "probePort" 8080 "metricsPort" 9090 "dnsPorts" (include "qlora-operator.dnsPorts" . | fromJsonArray) -}}
{{- $_ := set $decided "leaderElection" (dict "leaseName" (include "qlora-operator.fullname" .)) -}}
{{- toYaml (merge $decided (deepCopy .Values.settings)) -}}
{{- end }}

{{/* Ports on which DNS answers, as a JSON list. `helm upgrade --reuse-values` has no value that the older chart lacks, and
a rule with an empty list of ports allows all of them. */}}
{{- define "qlora-operator.dnsPorts" -}}
{{- toJson (default (list 53) .Values.jobNetworkPolicies.dnsPorts) -}}
{{- end }}

{{/* Clouds whose identity prepare and publish may use by some profile, as a JSON list. */}}
{{- define "qlora-operator.identityProviders" -}}
{{- $providers := list -}}
{{- range (include "qlora-operator.settings" . | fromYaml).profiles -}}
{{- with .cloudIdentity }}{{ $providers = append $providers .provider }}{{ end -}}
{{- end -}}
{{- toJson (uniq $providers) -}}
{{- end }}

{{/* Ports of the servers that the profiles name, as a JSON list: those of their URLs, or of the scheme. */}}
{{- define "qlora-operator.serverPorts" -}}
{{- $ports := list -}}
{{- range (include "qlora-operator.settings" . | fromYaml).profiles -}}
{{- $store := default dict .objectStore -}}
{{- $servers := list (default "https://huggingface.co" .hubEndpoint) (default "https://s3.amazonaws.com" $store.endpoint) -}}
{{- range default dict .tracking }}{{ $servers = append $servers .url }}{{ end -}}
{{- with (default dict .googleStorage).endpoint }}{{ $servers = append $servers . }}{{ end -}}
{{- with (default dict .azureStorage).endpoint }}{{ $servers = append $servers . }}{{ end -}}
{{- with .httpsProxy }}{{ $servers = append $servers . }}{{ end -}}
{{- range .registries }}{{ $servers = append $servers (ternary . (printf "https://%s" .) (contains "://" .)) }}{{ end -}}
{{- range $servers -}}
{{- $port := regexFind ":[0-9]+$" (urlParse .).host | trimPrefix ":" -}}
{{- $ports = append $ports (int (default (ternary "80" "443" (hasPrefix "http://" .)) $port)) -}}
{{- end -}}
{{- end -}}
{{- toJson (uniq $ports) -}}
{{- end }}
