{{/*
The writes of the operator that are admitted, by policy: `resources` as in a ValidatingAdmissionPolicy, `variables` and
`validations`.
*/}}
{{- define "qlora-operator.admissionPolicies" -}}
- name: jobs
  resources: {apiGroups: [batch], apiVersions: [v1], resources: [jobs], operations: [CREATE]}
  variables:
    - name: labels
      expression: object.spec.template.metadata.?labels.orValue({})
    - name: pod
      expression: object.spec.template.spec
    - name: repositories
      expression: {{ include "qlora-operator.repositories" . | quote }}
  validations:
    - message: the operator creates Jobs only for a QLoRAJob or QLoRASweep, with the labels of its pods
      expression: >-
        variables.owners.exists(owner, owner.kind in ['QLoRAJob', 'QLoRASweep'] &&
        owner.apiVersion.startsWith('qlora.dev/') && variables.labels[?'qlora.dev/job-uid'].orValue('') == owner.uid) &&
        'qlora.dev/job' in variables.labels && !object.spec.?manualSelector.orValue(false) &&
        variables.labels[?'qlora.dev/step'].orValue('') in ['prepare', 'train', 'publish', 'clean']
    - message: the operator creates pods with images of the profiles only (admission.images of the chart has more)
      expression: >-
        variables.pod.containers.all(each, variables.repositories.exists(repository, each.image.startsWith(repository) &&
        (repository.endsWith('/') || each.image.substring(repository.size()).matches('^([:@][^/]*)?$'))))
    - message: the operator creates pods with one container, which runs a step of the trainer
      expression: >-
        variables.pod.containers.size() == 1 && !has(variables.pod.initContainers) &&
        variables.pod.containers.all(each, each.name == 'trainer' && !has(each.command) && !has(each.workingDir) &&
        !has(each.lifecycle) && !has(each.livenessProbe) && !has(each.readinessProbe) && !has(each.startupProbe) &&
        !has(each.ports) && !has(each.volumeDevices) && !has(each.envFrom) && has(each.args) &&
        each.args[0] == variables.labels[?'qlora.dev/step'].orValue(''))
    - message: the operator sets only the environment variables that steps read
      expression: >-
        variables.pod.containers.all(each, each.?env.orValue([]).all(variable,
        variable.name.matches('^(HOME|OMP_NUM_THREADS|HTTPS_PROXY|NO_PROXY|HF_ENDPOINT|AWS_ENDPOINT_URL|AWS_REGION|GOOGLE_BASE_URL|AZURE_STORAGE_ACCOUNT_NAME|AZURE_STORAGE_ENDPOINT|(QLORA|NCCL)_[A-Z0-9_]+)$') ||
        (variable.name == 'LD_PRELOAD' && variable.value == 'libtcmalloc_minimal.so.4'))) &&
        variables.pod.containers.all(each, each.?env.orValue([]).all(variable, !has(variable.valueFrom) ||
        has(variable.valueFrom.fieldRef) || has(variable.valueFrom.resourceFieldRef)))
    - message: the operator creates pods without privileges
      expression: >-
        variables.pod.containers.all(each, !each.securityContext.?privileged.orValue(false) &&
        !each.securityContext.?allowPrivilegeEscalation.orValue(true) &&
        each.securityContext.?readOnlyRootFilesystem.orValue(false) &&
        each.securityContext.?capabilities.?drop.orValue([]).exists(dropped, dropped == 'ALL') &&
        each.securityContext.?capabilities.?add.orValue([]).size() == 0 &&
        each.securityContext.?runAsNonRoot.orValue(true) && !has(each.securityContext.runAsUser) &&
        !has(each.securityContext.seccompProfile) && !has(each.securityContext.appArmorProfile) &&
        !has(each.securityContext.seLinuxOptions) && !has(each.securityContext.procMount)) &&
        variables.pod.securityContext.?runAsNonRoot.orValue(false) &&
        variables.pod.securityContext.?runAsUser.orValue(1) > 0 &&
        variables.pod.securityContext.?seccompProfile.?type.orValue('') == 'RuntimeDefault' &&
        !has(variables.pod.securityContext.appArmorProfile) && !has(variables.pod.securityContext.seLinuxOptions) &&
        !has(variables.pod.securityContext.sysctls)
    - message: the operator creates pods in no namespace of their node, and with the cluster's names
      expression: >-
        !variables.pod.?hostNetwork.orValue(false) && !variables.pod.?hostPID.orValue(false) &&
        !variables.pod.?hostIPC.orValue(false) && !has(variables.pod.hostAliases) && !has(variables.pod.dnsConfig) &&
        variables.pod.?dnsPolicy.orValue('ClusterFirst') == 'ClusterFirst'
    - message: >-
        the operator creates pods with volumes of these kinds only: persistentVolumeClaim, emptyDir, downwardAPI, secret,
        configMap, and projected of secrets
      expression: >-
        variables.pod.?volumes.orValue([]).all(volume, has(volume.persistentVolumeClaim) || has(volume.emptyDir) ||
        has(volume.downwardAPI) || has(volume.secret) || has(volume.configMap) ||
        (has(volume.projected) && volume.projected.?sources.orValue([]).all(source, has(source.secret))))
    - message: the operator mounts volumes only where steps read and write, and nothing over the trainer's files
      expression: >-
        variables.pod.containers.all(each, each.?volumeMounts.orValue([]).all(mount, !mount.mountPath.contains('..') &&
        mount.mountPath.matches('^/(etc/qlora|workspace|tmp|dev/shm|volumes|config-maps|model-cache|secrets|credentials|ca|proxy|continued)(/|$)')))
    - message: >-
        the operator creates pods without a token, with service accounts of the profiles only (admission.serviceAccounts
        of the chart has more)
      expression: >-
        !variables.pod.?automountServiceAccountToken.orValue(true) &&
        variables.pod.?serviceAccountName.orValue('default') in {{ include "qlora-operator.podAccounts" . }}
    - message: the operator leaves the node to the scheduler, and names no PriorityClass of the system
      expression: >-
        !has(variables.pod.nodeName) && !variables.pod.?priorityClassName.orValue('').startsWith('system-')
- name: deletions
  resources: {apiGroups: [batch], apiVersions: [v1], resources: [jobs], operations: [DELETE]}
  validations:
    - message: the operator deletes only Jobs of a QLoRAJob or QLoRASweep
      expression: >-
        variables.owners.exists(owner, owner.kind in ['QLoRAJob', 'QLoRASweep'] &&
        owner.apiVersion.startsWith('qlora.dev/'))
- name: revisions
  resources: {apiGroups: [apps], apiVersions: [v1], resources: [controllerrevisions], operations: [CREATE, UPDATE]}
  validations:
    - message: the operator creates only ControllerRevisions of a QLoRAJob, with its name and label
      expression: >-
        variables.owners.exists(owner, owner.kind == 'QLoRAJob' && owner.apiVersion.startsWith('qlora.dev/') &&
        object.metadata.name.startsWith(owner.name + '-') &&
        object.metadata.?labels[?'qlora.dev/job-uid'].orValue('') == owner.uid)
    - message: the operator changes only the owner of a restored ControllerRevision of a QLoRAJob
      expression: >-
        oldObject == null || (has(oldObject.metadata.labels) && 'qlora.dev/job-uid' in oldObject.metadata.labels &&
        !oldObject.metadata.?ownerReferences.orValue([]).exists(owner, owner.?controller.orValue(false)))
- name: cells
  resources: {apiGroups: [qlora.dev], apiVersions: ["*"], resources: [qlorajobs], operations: [CREATE, UPDATE]}
  validations:
    - message: the operator writes only QLoRAJobs that are cells of a QLoRASweep
      expression: >-
        variables.owners.exists(owner, owner.kind == 'QLoRASweep' && owner.apiVersion.startsWith('qlora.dev/') &&
        object.metadata.?labels[?'qlora.dev/sweep-uid'].orValue('') == owner.uid) && (oldObject == null ||
        (object.metadata.?ownerReferences == oldObject.metadata.?ownerReferences &&
        object.metadata.?labels == oldObject.metadata.?labels))
    - message: the operator changes only suspend and cleanupAfterSeconds of a spec, and annotations
      expression: >-
        oldObject == null || (object.spec.?gate == oldObject.spec.?gate && object.spec.?retry == oldObject.spec.?retry &&
        object.spec.?budget == oldObject.spec.?budget && object.spec.?resources == oldObject.spec.?resources &&
        object.spec.?cancel == oldObject.spec.?cancel &&
        object.spec.?activeDeadlineSeconds == oldObject.spec.?activeDeadlineSeconds &&
        object.spec.?progressDeadlineSeconds == oldObject.spec.?progressDeadlineSeconds &&
        object.spec.?ttlSecondsAfterFinished == oldObject.spec.?ttlSecondsAfterFinished &&
        object.spec.?workspace == oldObject.spec.?workspace)
- name: ended-jobs
  resources: {apiGroups: [qlora.dev], apiVersions: ["*"], resources: [qlorajobs], operations: [DELETE]}
  validations:
    - message: the operator deletes only QLoRAJobs that have ended
      expression: oldObject.?status.?completionTime.hasValue()
- name: ended-sweeps
  resources: {apiGroups: [qlora.dev], apiVersions: ["*"], resources: [qlorasweeps], operations: [DELETE]}
  validations:
    - message: the operator deletes only QLoRASweeps that have ended
      expression: oldObject.?status.?completionTime.hasValue()
- name: networkpolicies
  resources:
    {apiGroups: [networking.k8s.io], apiVersions: [v1], resources: [networkpolicies], operations: [CREATE, UPDATE]}
  validations:
    - message: the operator writes only the NetworkPolicies of jobs, for their pods
      expression: >-
        (object.metadata.name in ['qlora-jobs', 'qlora-servers', 'qlora-identity-google', 'qlora-identity-aws'] &&
        object.spec.podSelector.?matchExpressions.orValue([]).exists(each, each.key == 'qlora.dev/job' &&
        each.operator == 'Exists')) || variables.owners.exists(owner, owner.kind == 'QLoRAJob' &&
        object.metadata.name == 'qlora-' + owner.uid &&
        object.spec.podSelector.?matchLabels[?'qlora.dev/job-uid'].orValue('') == owner.uid)
- name: services
  resources: {apiGroups: [""], apiVersions: [v1], resources: [services], operations: [CREATE]}
  validations:
    - message: the operator creates only headless Services for the pods of one QLoRAJob
      expression: >-
        variables.owners.exists(owner, owner.kind == 'QLoRAJob' && object.metadata.name == 'qlora-' + owner.uid &&
        object.spec.?selector[?'qlora.dev/job-uid'].orValue('') == owner.uid) &&
        object.spec.?type.orValue('ClusterIP') == 'ClusterIP' && object.spec.?clusterIP.orValue('') == 'None' &&
        !has(object.spec.externalIPs)
- name: claims
  resources: {apiGroups: [""], apiVersions: [v1], resources: [persistentvolumeclaims], operations: [CREATE, UPDATE]}
  validations:
    - message: the operator writes only claims of jobs and sweeps, and creates them for new and empty volumes
      expression: >-
        object.metadata.?labels[?'app.kubernetes.io/managed-by'].orValue('') == 'qlora-operator' &&
        ('qlora.dev/job-uid' in object.metadata.labels || 'qlora.dev/sweep-uid' in object.metadata.labels) &&
        (oldObject != null || (!has(object.spec.volumeName) && !has(object.spec.dataSource) &&
        !has(object.spec.dataSourceRef)))
    - message: the operator changes only the owners of a claim
      expression: >-
        oldObject == null || (object.spec == oldObject.spec &&
        object.metadata.?labels == oldObject.metadata.?labels &&
        object.metadata.?annotations == oldObject.metadata.?annotations)
- name: ended-claims
  resources: {apiGroups: [""], apiVersions: [v1], resources: [persistentvolumeclaims], operations: [DELETE]}
  validations:
    - message: the operator deletes only claims of jobs and sweeps
      expression: >-
        oldObject.metadata.?labels[?'app.kubernetes.io/managed-by'].orValue('') == 'qlora-operator' &&
        ('qlora.dev/job-uid' in oldObject.metadata.labels || 'qlora.dev/sweep-uid' in oldObject.metadata.labels)
{{- if (.Values.announce).enabled }}
- name: announcements
  resources: {apiGroups: [""], apiVersions: [v1], resources: [configmaps], operations: [CREATE, UPDATE]}
  validations:
    - message: the operator writes only ConfigMaps with the label qlora.dev/announcements
      expression: >-
        object.metadata.?labels[?'qlora.dev/announcements'].orValue('') == 'true' && (oldObject == null ||
        oldObject.metadata.?labels[?'qlora.dev/announcements'].orValue('') == 'true')
{{- end }}
{{- end }}

{{/* Repositories of the trainer images, as a list of CEL: those of the chart, of the profiles, and of admission.images. */}}
{{- define "qlora-operator.repositories" -}}
{{- $images := concat (list .Values.trainer.image.repository) (default list (.Values.admission).images) -}}
{{- range .Values.profiles }}{{ range list .image (default dict .canary).image (default dict .evaluation).image }}{{ with . }}{{ $images = append $images . }}{{ end }}{{ end }}{{ end -}}
{{- $repositories := list -}}
{{- range $images }}{{ $repositories = append $repositories (regexReplaceAll "(:[^/:@]*)?(@.*)?$" . "") }}{{ end -}}
['{{ uniq $repositories | join "', '" }}']
{{- end }}

{{/* The service accounts that pods of jobs may have, as a list of CEL. */}}
{{- define "qlora-operator.podAccounts" -}}
{{- $accounts := concat (list "default") (default list (.Values.admission).serviceAccounts) -}}
{{- range .Values.profiles -}}
{{- with .serviceAccountName }}{{ $accounts = append $accounts . }}{{ end -}}
{{- with .cloudIdentity }}{{ $accounts = append $accounts .serviceAccountName }}{{ end -}}
{{- end -}}
['{{ uniq $accounts | join "', '" }}']
{{- end }}
