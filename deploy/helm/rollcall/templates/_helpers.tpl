{{/* The name that resources begin with. */}}
{{- define "rollcall.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else if contains .Chart.Name .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{/* What a component's pods are selected by. Takes a list: the root, and the component's name. */}}
{{- define "rollcall.selector" -}}
app.kubernetes.io/name: {{ (index . 0).Chart.Name }}
app.kubernetes.io/instance: {{ (index . 0).Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end -}}

{{/* A component's labels. Takes the same. */}}
{{- define "rollcall.labels" -}}
{{ include "rollcall.selector" . }}
app.kubernetes.io/part-of: {{ (index . 0).Chart.Name }}
app.kubernetes.io/version: {{ include "rollcall.tag" (index . 0) | quote }}
app.kubernetes.io/managed-by: {{ (index . 0).Release.Service }}
helm.sh/chart: {{ printf "%s-%s" (index . 0).Chart.Name (index . 0).Chart.Version | quote }}
{{- end -}}

{{- define "rollcall.tag" -}}
{{- .Values.image.tag | default .Chart.AppVersion -}}
{{- end -}}

{{/* The image of a service. Takes a list: the root, and the service's name. */}}
{{- define "rollcall.image" -}}
{{- $root := index . 0 -}}
{{- $parts := compact (list $root.Values.image.registry $root.Values.image.repository (index . 1)) -}}
{{- printf "%s:%s" (join "/" $parts) (include "rollcall.tag" $root) -}}
{{- end -}}

{{/* All services that are installed, each with the defaults for what it does not say: a dict of dicts. */}}
{{- define "rollcall.services" -}}
{{- $services := dict -}}
{{- range $name, $own := .Values.services -}}
{{- $service := mergeOverwrite (deepCopy $.Values.defaults) (deepCopy ($own | default dict)) -}}
{{- if $service.enabled -}}
{{- $longest := printf "%s-%s-headless" (include "rollcall.fullname" $) $name -}}
{{- if gt (len $longest) 63 -}}
{{- fail (printf "services.%s: expected names of at most 63 characters, found %q, which has %d: choose a shorter release's name, or fullnameOverride" $name $longest (len $longest)) -}}
{{- end -}}
{{- if and $service.store.size (not $service.databaseSecret.name) (gt (int $service.replicas) 1) -}}
{{- fail (printf "services.%s.replicas: expected 1, found %d: instances on several nodes cannot share the volume that `store` gives them; set databaseSecret.name, to use a database instead" $name (int $service.replicas)) -}}
{{- end -}}
{{- $services = set $services $name $service -}}
{{- end -}}
{{- end -}}
{{- range $name, $service := $services -}}
{{- $calls := list -}}
{{- range $service.calls -}}
{{- if eq . "*" -}}
{{- range $other, $called := $services }}{{ if and $called.public (ne $other $name) }}{{ $calls = append $calls $other }}{{ end }}{{ end -}}
{{- else if hasKey $.Values.services . -}}
{{- $calls = append $calls . -}}
{{- else -}}
{{- fail (printf "services.%s.calls: expected names of services, or *, found %q; there are: %s" $name . (keys $.Values.services | sortAlpha | join ", ")) -}}
{{- end -}}
{{- end -}}
{{- $_ := set $service "calls" (uniq $calls) -}}
{{- end -}}
{{- toJson $services -}}
{{- end -}}

{{/* Whether Consul's servers are installed: "true", or nothing. */}}
{{- define "rollcall.consul" -}}
{{- if and (eq .Values.registry "consul") (not .Values.consul.external.addresses) }}true{{ end -}}
{{- end -}}

{{/* The names of Consul's own servers, without ports; as they are within the namespace. */}}
{{- define "rollcall.consul.hosts" -}}
{{- $service := printf "%s-consul-server" (include "rollcall.fullname" .) -}}
{{- $hosts := list -}}
{{- range until (int .Values.consul.replicas) -}}
{{- $hosts = append $hosts (printf "%s-%d.%s" $service . $service) -}}
{{- end -}}
{{- toJson $hosts -}}
{{- end -}}

{{/* Where services find Consul: its servers, each by its own name, or the client agent of their own node. */}}
{{- define "rollcall.consul.addresses" -}}
{{- if .Values.consul.client.enabled -}}
{{- printf "%s-consul-client:8500" (include "rollcall.fullname" .) -}}
{{- else if .Values.consul.external.addresses -}}
{{- join "," .Values.consul.external.addresses -}}
{{- else -}}
{{- $addresses := list -}}
{{- range include "rollcall.consul.hosts" . | fromJsonArray -}}
{{- $addresses = append $addresses (printf "%s:8500" .) -}}
{{- end -}}
{{- join "," $addresses -}}
{{- end -}}
{{- end -}}

{{/* What Consul's servers and client agents are both told, as a dict. */}}
{{- define "rollcall.consul.agentConfig" -}}
{{- dict
  "datacenter" .Values.consul.datacenter
  "data_dir" "/consul/data"
  "client_addr" "0.0.0.0"
  "ports" (dict "dns" -1 "grpc" -1 "grpc_tls" -1 "serf_wan" -1)
  "retry_join" (include "rollcall.consul.hosts" . | fromJsonArray)
  "retry_interval" "2s"
  "leave_on_terminate" true
  "log_level" .Values.consul.logLevel
  "telemetry" (dict "prometheus_retention_time" "1m" "disable_hostname" true)
  "limits" (dict "http_max_conns_per_client" 2000)
  "enable_script_checks" false
  "enable_local_script_checks" false
  "disable_update_check" true
  | toJson -}}
{{- end -}}

{{- define "rollcall.consul.serverConfig" -}}
{{- merge (dict
  "server" true
  "bootstrap_expect" (int .Values.consul.replicas)
  "performance" (dict "raft_multiplier" 1)
  "autopilot" (dict
    "cleanup_dead_servers" true
    "min_quorum" (add (div (int .Values.consul.replicas) 2) 1)
    "server_stabilization_time" "5s"
    "last_contact_threshold" "1s")
  "ui_config" (dict "enabled" true)
  ) (include "rollcall.consul.agentConfig" . | fromJson) | toPrettyJson -}}
{{- end -}}

{{/* What the restricted Pod Security level asks of a pod. Takes the uid. */}}
{{- define "rollcall.podSecurity" -}}
runAsNonRoot: true
runAsUser: {{ . }}
runAsGroup: {{ . }}
fsGroup: {{ . }}
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{/* And of a container. */}}
{{- define "rollcall.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end -}}

{{/* Pods of a component keep away from each other where they can. Takes a list: the root, and the component's name. */}}
{{- define "rollcall.spread" -}}
- maxSkew: 1
  topologyKey: kubernetes.io/hostname
  whenUnsatisfiable: ScheduleAnyway
  labelSelector:
    matchLabels:
      {{- include "rollcall.selector" . | nindent 6 }}
  matchLabelKeys: [pod-template-hash]
{{- end -}}

{{/* In a NetworkPolicy: a component's pods, as one of a rule's peers. Takes a list: the root, and its name. */}}
{{- define "rollcall.peer" -}}
podSelector:
  matchLabels:
    {{- include "rollcall.selector" . | nindent 4 }}
{{- end -}}

{{/* To the names of the cluster. */}}
{{- define "rollcall.toDns" -}}
- to:
    - namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: kube-system}}
      podSelector: {matchLabels: {k8s-app: kube-dns}}
  ports:
    - {port: 53, protocol: UDP}
    - {port: 53, protocol: TCP}
{{- end -}}

{{/* And to where services are looked up: Kubernetes' API, Consul, or the client agents in front of it. */}}
{{- define "rollcall.toRegistry" -}}
{{- if eq .Values.registry "kubernetes" -}}
- ports:
    {{- range .Values.networkPolicy.apiServer.ports }}
    - {port: {{ . }}}
    {{- end }}
  {{- with .Values.networkPolicy.apiServer.to }}
  to:
    {{- toYaml . | nindent 4 }}
  {{- end }}
{{- else if .Values.consul.client.enabled -}}
{{- /* The servers as well: with them the pods are registered that are replaced when this is turned on. */ -}}
- to:
    - podSelector:
        matchLabels:
          {{- include "rollcall.selector" (list . "consul-client") | nindent 10 }}
    - podSelector:
        matchLabels:
          {{- include "rollcall.selector" (list . "consul-server") | nindent 10 }}
  ports:
    - {port: 8500}
{{- else if .Values.consul.external.addresses -}}
- ports:
    {{- $ports := list }}
    {{- range .Values.consul.external.addresses }}
    {{- $ports = append $ports (regexFind "[0-9]+$" .) }}
    {{- end }}
    {{- range uniq $ports }}
    - {port: {{ . }}}
    {{- end }}
{{- else -}}
- to:
    - podSelector:
        matchLabels:
          {{- include "rollcall.selector" (list . "consul-server") | nindent 10 }}
  ports:
    - {port: 8500}
{{- end -}}
{{- end -}}
