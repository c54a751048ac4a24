{{/* Holds "awq-serve" in any case: the alert rules find the job by it. */}}
{{- define "awq-serve.fullname" -}}
{{- if contains "awq-serve" .Release.Name -}}
{{- .Release.Name | trunc 63 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-awq-serve" (.Release.Name | trunc 53 | trimSuffix "-") -}}
{{- end -}}
{{- end -}}

{{- define "awq-serve.selector" -}}
app.kubernetes.io/name: awq-serve
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "awq-serve.labels" -}}
{{ include "awq-serve.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}
