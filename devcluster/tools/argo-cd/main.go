// What Argo CD makes of jobs and of an ApplicationSet, by the code that its controllers and its API server run.
//
// Input, JSON on standard input:
//
//	{"settings": the data of the ConfigMap argocd-cm, "objects": [...], "compared": [{"desired", "live"}, ...],
//	 "applicationSets": [...]}
//
// Output, JSON:
//
//	{"objects": [{"health": {"status", "message"} or null, "actions": {name: the changed object}}, ...],
//	 "drifted": [whether the live object differs from the desired one, ...], "applications": [...]}
package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"

	"github.com/argoproj/argo-cd/gitops-engine/pkg/health"
	"github.com/argoproj/argo-cd/v3/applicationset/utils"
	appv1 "github.com/argoproj/argo-cd/v3/pkg/apis/application/v1alpha1"
	"github.com/argoproj/argo-cd/v3/util/argo/diff"
	"github.com/argoproj/argo-cd/v3/util/argo/normalizers"
	"github.com/argoproj/argo-cd/v3/util/lua"
	"github.com/argoproj/argo-cd/v3/util/settings"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/client-go/kubernetes/fake"
)

const namespace = "argocd"

type pair struct {
	Desired *unstructured.Unstructured `json:"desired"`
	Live    *unstructured.Unstructured `json:"live"`
}

type input struct {
	Settings        map[string]string            `json:"settings"`
	Objects         []*unstructured.Unstructured `json:"objects"`
	Compared        []pair                       `json:"compared"`
	ApplicationSets []appv1.ApplicationSet       `json:"applicationSets"`
}

type shown struct {
	Health  *health.HealthStatus      `json:"health"`
	Actions map[string]map[string]any `json:"actions"`
}

type output struct {
	Objects      []shown              `json:"objects"`
	Drifted      []bool               `json:"drifted"`
	Applications []*appv1.Application `json:"applications"`
}

type overrides map[string]appv1.ResourceOverride

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run() error {
	var given input
	if err := json.NewDecoder(os.Stdin).Decode(&given); err != nil {
		return fmt.Errorf("standard input: %w", err)
	}
	found, err := readSettings(given.Settings)
	if err != nil {
		return fmt.Errorf("settings: %w", err)
	}
	var result output
	for number, object := range given.Objects {
		answer, err := look(object, found)
		if err != nil {
			return fmt.Errorf("object %d: %w", number, err)
		}
		result.Objects = append(result.Objects, answer)
	}
	for number, compared := range given.Compared {
		differs, err := drifted(compared, found)
		if err != nil {
			return fmt.Errorf("comparison %d: %w", number, err)
		}
		result.Drifted = append(result.Drifted, differs)
	}
	for _, set := range given.ApplicationSets {
		applications, err := generate(set)
		if err != nil {
			return fmt.Errorf("ApplicationSet %s: %w", set.Name, err)
		}
		result.Applications = append(result.Applications, applications...)
	}
	return json.NewEncoder(os.Stdout).Encode(result)
}

func readSettings(data map[string]string) (overrides, error) {
	labels := map[string]string{"app.kubernetes.io/part-of": "argocd"}
	client := fake.NewClientset(
		&corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: "argocd-cm", Labels: labels}, Data: data},
		&corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: "argocd-secret", Labels: labels}},
	)
	return settings.NewSettingsManager(context.Background(), client, namespace).GetResourceOverrides()
}

func look(object *unstructured.Unstructured, found overrides) (shown, error) {
	result := shown{Actions: map[string]map[string]any{}}
	status, err := health.GetResourceHealth(object, lua.ResourceHealthOverrides(found))
	if err != nil {
		return result, err
	}
	result.Health = status
	vm := lua.VM{ResourceOverrides: found}
	scripts, err := vm.GetResourceActionDiscovery(object)
	if err != nil {
		return result, err
	}
	offered, err := vm.ExecuteResourceActionDiscovery(object, scripts)
	if err != nil {
		return result, err
	}
	for _, action := range offered {
		definition, err := vm.GetResourceAction(object, action.Name)
		if err != nil {
			return result, err
		}
		changed, err := vm.ExecuteResourceAction(object, definition.ActionLua, nil)
		if err != nil {
			return result, err
		}
		if len(changed) != 1 || changed[0].K8SOperation != lua.PatchOperation {
			return result, fmt.Errorf("action %s: expected one object to patch", action.Name)
		}
		result.Actions[action.Name] = changed[0].UnstructuredObj.Object
	}
	return result, nil
}

func drifted(compared pair, found overrides) (bool, error) {
	config, err := diff.NewDiffConfigBuilder().
		WithDiffSettings(nil, found, false, normalizers.IgnoreNormalizerOpts{}).
		WithTracking("app.kubernetes.io/instance", string(appv1.TrackingMethodAnnotation)).
		WithNoCache().
		Build()
	if err != nil {
		return false, err
	}
	result, err := diff.StateDiff(compared.Live, compared.Desired, config)
	return result.Modified, err
}

// generate serves list generators only, as generators.ListGenerator does: the package of all generators would bring the
// clients of every Git service.
func generate(set appv1.ApplicationSet) ([]*appv1.Application, error) {
	template := set.Spec.Template
	application := &appv1.Application{
		ObjectMeta: metav1.ObjectMeta{
			Name:        template.Name,
			Namespace:   template.Namespace,
			Labels:      template.Labels,
			Annotations: template.Annotations,
		},
		Spec: template.Spec,
	}
	var applications []*appv1.Application
	for _, generator := range set.Spec.Generators {
		for _, element := range generator.List.Elements {
			var parameters map[string]any
			if err := json.Unmarshal(element.Raw, &parameters); err != nil {
				return nil, err
			}
			rendered, err := (&utils.Render{}).RenderTemplateParams(
				application, set.Spec.SyncPolicy, parameters, set.Spec.GoTemplate, set.Spec.GoTemplateOptions)
			if err != nil {
				return nil, err
			}
			applications = append(applications, rendered)
		}
	}
	return applications, nil
}
